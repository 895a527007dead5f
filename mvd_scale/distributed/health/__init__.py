"""Health of a running job: progress of its ranks, the watchdog that ends it when it hangs, and what it leaves."""
