"""What writes do: triggers, backfill and deferred embedding."""
