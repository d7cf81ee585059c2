"""What the example of a shared cache needs around it: a server, and another process."""
