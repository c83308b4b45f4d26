//! Files that the program writes: each appears whole or not at all.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::console;
use crate::failure::Failure;
use crate::interrupt;

fn problem(path: &Path, text: impl Display) -> Failure {
    Failure::usage(format!("{}: {text}", path.display()))
}

/// A place that can be written to. What is there stays until the new file is whole.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    /// None for stdout.
    partial: Option<PathBuf>,
}

impl Output {
    /// Checks that the file can be written, before anything is computed for it. Leaves nothing there. `-` is stdout.
    pub fn check(path: &Path) -> Result<Self, Failure> {
        if path.as_os_str() == "-" {
            return Ok(Output { path: path.to_owned(), partial: None });
        }
        Output::check_file(path)
    }

    fn check_file(path: &Path) -> Result<Self, Failure> {
        if path.file_name().is_none() || path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(problem(path, "is not the name of a file"));
        }
        if fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) && fs::canonicalize(path).is_err() {
            return Err(problem(path, "is a link to nothing"));
        }
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => return Err(problem(path, "is a directory, not a file to write to")),
            Ok(found) if !found.is_file() => return Err(problem(path, "is not a regular file")),
            Ok(found) if found.permissions().readonly() => return Err(problem(path, "is read-only")),
            // Of a name that is too long, among others.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(problem(path, format_args!("cannot be written: {error}")));
            }
            _ => {}
        }
        // A link keeps pointing where it does: the file behind it is replaced.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        // A killed run may have left one behind: take the first name that is free.
        let name = |n: u32| path.with_file_name(format!(".egmla.{}.{n}.partial", std::process::id()));
        let partial = (0..100).map(name).find(|name| !name.exists()).unwrap_or_else(|| name(0));
        let unfinished = partial.clone();
        interrupt::undo(move || drop(fs::remove_file(unfinished)));
        let created = File::create_new(&partial);
        created.map_err(|error| problem(&path, format_args!("cannot be written: {error}")))?;
        remove(&partial);
        Ok(Output { path, partial: Some(partial) })
    }

    /// Refuses to replace a file that the run reads.
    pub fn refuse_input(&self, option: &str, input: &Path) -> Result<(), Failure> {
        if self.partial.is_none() {
            return Ok(());
        }
        if fs::canonicalize(input).is_ok_and(|input| input == self.path) || same_file(input, &self.path) {
            return Err(problem(&self.path, format_args!("is the --{option} file: choose another output")));
        }
        Ok(())
    }

    /// The same for a file whose folders may not be there yet: they are made.
    pub fn check_with_folders(path: &Path) -> Result<Self, Failure> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(|error| problem(folder, error))?;
        }
        Output::check_file(path)
    }

    /// Puts the file there, unless the run was interrupted.
    pub fn write(&self, bytes: &[u8]) -> Result<(), Failure> {
        self.put(bytes, interrupt::check)
    }

    /// Puts the file there, also in a run that was interrupted: with what it has.
    pub fn keep(&self, bytes: &[u8]) -> Result<(), Failure> {
        self.put(bytes, || Ok(()))
    }

    fn put(&self, bytes: &[u8], wanted: fn() -> Result<(), Failure>) -> Result<(), Failure> {
        let Some(partial) = &self.partial else {
            wanted()?;
            return console::write(bytes);
        };
        let written = File::create_new(partial).and_then(|mut file| {
            // The new file has the old one's permissions.
            if let Ok(old) = fs::metadata(&self.path) {
                file.set_permissions(old.permissions())?;
            }
            file.write_all(bytes)?;
            file.sync_all()
        });
        // Until here an interrupted run keeps the old file.
        let replaced = match written {
            Ok(()) => wanted().and_then(|()| fs::rename(partial, &self.path).map_err(|error| self.not_written(&error))),
            Err(error) => Err(self.not_written(&error)),
        };
        if replaced.is_err() {
            remove(partial);
        }
        replaced
    }

    fn not_written(&self, error: &io::Error) -> Failure {
        Failure::run(format!("{}: {error}", self.path.display()))
    }
}

/// A file that cannot be removed was not written.
fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}

/// Two names of one file, as hard links are.
#[cfg(unix)]
fn same_file(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
fn same_file(_: &Path, _: &Path) -> bool {
    false
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::Output;
    use crate::failure::Failure;

    #[test]
    fn an_output_is_whole_or_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let entries = || std::fs::read_dir(folder.path()).unwrap().count();
        let output = Output::check(&folder.path().join("y")).unwrap();
        assert_eq!(entries(), 0, "checking leaves nothing");
        output.write(b"whole").unwrap();
        assert_eq!(entries(), 1, "no partial file is left");
        assert_eq!(std::fs::read(folder.path().join("y")).unwrap(), b"whole");
        let refused = |path| Output::check(path).unwrap_err();
        assert!(matches!(refused(folder.path()), Failure::Usage(text) if text.contains("is a directory")));
        let nowhere = folder.path().join("none/y");
        assert!(matches!(refused(&nowhere), Failure::Usage(text) if text.contains("cannot be written")));
        Output::check_with_folders(&nowhere).unwrap().write(b"").unwrap();
        assert!(nowhere.is_file());
        let long = folder.path().join("y".repeat(256));
        assert!(matches!(refused(&long), Failure::Usage(text) if text.contains("yyy: cannot be written")));
        let below_a_file = nowhere.join("z");
        let refused = Output::check_with_folders(&below_a_file).unwrap_err();
        assert!(matches!(refused, Failure::Usage(text) if text.contains("none/y: ")));
    }
}
