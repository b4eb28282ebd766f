"""The event log and the filters, without HTTP."""
