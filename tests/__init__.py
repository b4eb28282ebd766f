"""The tests, with one folder for each subject."""
