"""The layer between the operating system and the application: processes, sockets, and the parts of one process."""
