"""How fast plato2 is, beside what, and what is measured on one GPU; README.md is the way in."""
