mod formats;
mod fuzz;

