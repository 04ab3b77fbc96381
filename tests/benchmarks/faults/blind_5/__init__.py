"""Cases by authors who had not seen a watch; run once, then looked at."""
