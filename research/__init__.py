"""How good the images are: quality of a service, and the study of schedules against time."""
