"""The guarantee under faults: writers, watchers, a judge, and servers that are killed, frozen and restarted."""
