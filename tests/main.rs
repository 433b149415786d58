mod formats;
mod fuzz;
