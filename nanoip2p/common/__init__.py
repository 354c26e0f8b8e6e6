"""What every part uses: files, command lines, config.json, plots."""
