"""One database for studies, leases, the ledger, the queue and the audit log."""
