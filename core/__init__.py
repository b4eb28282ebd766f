"""Code that every layer may import: settings, errors, filters, times, logs, metrics and the shutdown state."""
