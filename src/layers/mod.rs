pub mod toc;
