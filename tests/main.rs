mod formats;
mod fs;
mod fuzz;
