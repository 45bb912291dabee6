"""One or many devices, one or many processes, and notices that they must end."""
