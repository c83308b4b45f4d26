//! The command-line program `egmla`.

mod adapter;
mod failure;

fn main() {
    let option = adapter::AdapterOption { adapter: std::env::args().nth(1).unwrap_or("auto".to_owned()) };
    match adapter::open(&option) {
        Ok(backend) => println!("{}", backend.describe()),
        Err(failure) => eprintln!("error: {failure:?}"),
    }
}
