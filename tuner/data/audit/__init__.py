"""The audit of a source: near-twins, shortcuts, and what else its splits hold."""
