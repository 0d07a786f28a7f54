"""Human evaluation (section 3.3.2, table 7): tasks, the page they are rated on, ratings, their statistics."""
