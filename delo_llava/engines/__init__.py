"""One process or many: what runs forward, backward and update, and how the processes of a run talk."""
