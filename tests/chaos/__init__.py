"""The delivery guarantee under faults: writers, watchers and a judge while servers are killed or frozen."""
