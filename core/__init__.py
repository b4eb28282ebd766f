"""What every layer may use: settings, errors, filters, times, logs, metrics and the state of the shutdown."""
