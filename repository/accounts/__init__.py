"""Users, sessions, one-time tokens, the outbox of emails, the audit trail."""
