"""Cases by authors who had not seen a watch; run blind on 2026-11-22, looked at since."""
