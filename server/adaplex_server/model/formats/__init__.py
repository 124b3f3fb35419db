"""How the weight of a linear is kept in memory, one module a format."""
