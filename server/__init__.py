"""Between the operating system and the application: listening, the stop, several workers, the protocols."""
