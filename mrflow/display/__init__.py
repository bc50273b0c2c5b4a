"""What people see: notes, progress, sheets of pictures, HTML for notebooks."""
