"""What people read: terminal summary, HTML pages and exports."""
