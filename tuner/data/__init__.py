"""Rows: sequences read from files, checked, encoded and split."""
