"""What every layer may use: settings, errors, filters, times, logs, metrics, the stop of the process."""
