"""Drives one study, or many: the coordinator, the service and what they write for readers."""
