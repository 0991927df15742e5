"""The stages of gpu_campaign.sh, each a process of its own that resumes where it was cut."""
