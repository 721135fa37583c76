"""One prefix store for a fleet: object storage behind the disk of each machine."""
