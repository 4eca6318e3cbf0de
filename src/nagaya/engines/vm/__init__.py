"""What the engines of virtual machines share: the initramfs with the agent in it, and what the agent is told to make."""
