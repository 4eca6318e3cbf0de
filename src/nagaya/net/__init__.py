"""Links, bridges, firewall and addresses."""
