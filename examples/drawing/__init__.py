"""How the examples' pictures look."""
