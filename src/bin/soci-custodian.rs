fn main() -> std::process::ExitCode {
    soci::custodian::main()
}
