"""Steps for Prefect: when, how often and how long; the work itself is done below."""
