"""Side-by-side measurements of speed (`plato2 bench`)."""
