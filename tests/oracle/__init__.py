"""Random writes against every kind of watcher: snapshot and events equal a fresh snapshot."""
