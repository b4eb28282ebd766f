"""Random writes against every kind of watcher: snapshot plus events must equal a fresh snapshot."""
