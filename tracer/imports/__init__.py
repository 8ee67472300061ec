"""What other tools wrote, put on a recording's timeline: captures, SLOWLOG, LATENCY, INFO."""
