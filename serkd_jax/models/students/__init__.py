"""The students, a file each."""
