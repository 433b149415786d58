mod cli;
mod formats;
mod fuzz;
