"""What concerns the catalog as a whole: similar movies, and a first catalog of films."""
