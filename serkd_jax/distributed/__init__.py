"""One device or many, one process or many, and notices that they must end."""
