fn main() -> std::process::ExitCode {
    soci::holder::main()
}
