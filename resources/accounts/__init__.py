"""Request and response models for accounts, and the fields that their lists can be filtered by."""
