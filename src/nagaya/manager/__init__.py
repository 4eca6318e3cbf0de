"""The front door: machines, images, volumes. The CLI and the library call nothing below it."""
