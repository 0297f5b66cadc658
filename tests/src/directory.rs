//! A configuration directory that is removed when its value is dropped.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::{binary, unique};

const UNPRIVILEGED: u32 = 65_534;

/// A temporary directory, with a configuration directory and scratch files in it.
#[derive(Debug)]
pub struct Directory {
    folder: TempDir,
}

impl Directory {
    /// Creates an empty directory that every user can read.
    ///
    /// # Errors
    /// Returns an error if the directory cannot be created.
    pub fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix(&unique("files-")).tempdir()?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        Ok(Self { folder })
    }

    /// Returns a command that runs `portolan` as an unprivileged user.
    ///
    /// # Errors
    /// Returns an error if the binary was not built or cannot be copied.
    pub fn portolan_unprivileged(&self) -> Result<Command> {
        // The user may have no access to the build directory.
        let copy = self.scratch("portolan");
        if !copy.exists() {
            // Copied by another process: if written here, a child that another thread forks could inherit the
            // writable descriptor, and running the copy would fail with ETXTBSY.
            let status = Command::new("cp").arg(binary("portolan")?).arg(&copy).status()?;
            ensure!(status.success(), "cp exited with {status}");
        }
        let mut command = Command::new(copy);
        command.uid(UNPRIVILEGED).gid(UNPRIVILEGED);
        Ok(command)
    }

    /// Returns the path of the configuration directory, which exists once a file has been written.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("config")
    }

    /// Runs `portolan plan` for a node, as an unprivileged user. Returns the JSON report and the exit status.
    ///
    /// # Errors
    /// Returns an error if the exit status is neither 0 nor 1 (findings), or if the output is not JSON.
    pub fn plan(&self, cluster: &str, node: &str, more: &[&str]) -> Result<(Value, i32)> {
        let mut command = self.portolan_unprivileged()?;
        command.arg("plan").arg("--config").arg(self.path()).args(["--cluster", cluster, "--node", node, "-o", "json"]);
        let output = command.args(more).output()?;
        let code = output.status.code().unwrap_or(-1);
        ensure!((0..=1).contains(&code), "plan exited with {code}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((serde_json::from_slice(&output.stdout).context(text)?, code))
    }

    /// Returns a path for another file of the test, outside the configuration.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes objects to a file of the configuration (`c1/services.yaml`), atomically.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub fn write(&self, file: &str, objects: &[Value]) -> Result<()> {
        let documents: Vec<String> = objects.iter().map(|object| format!("{object:#}\n")).collect();
        self.write_text(file, &documents.join("---\n"))
    }

    /// Writes text to a file of the configuration, atomically.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub fn write_text(&self, file: &str, text: &str) -> Result<()> {
        let path = self.path().join(file);
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)?;
        let draft = folder.join(format!(".{}.draft", path.file_name().unwrap_or_default().display()));
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Returns the objects in the files of a directory that the test has written, without subdirectories.
    ///
    /// # Errors
    /// Returns an error if a file cannot be read, or if another program wrote it.
    pub fn objects(&self, folder: &str) -> Result<Vec<Value>> {
        let mut objects = Vec::new();
        for entry in fs::read_dir(self.path().join(folder))?.flatten() {
            let is_draft = entry.file_name().to_string_lossy().starts_with('.');
            if is_draft || !entry.path().is_file() {
                continue;
            }
            for document in fs::read_to_string(entry.path())?.split("---\n") {
                objects.push(serde_json::from_str(document).context("not a document that this test wrote")?);
            }
        }
        Ok(objects)
    }

    /// Removes a file of the configuration.
    ///
    /// # Errors
    /// Returns an error if the file does not exist.
    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.path().join(file)).with_context(|| format!("cannot remove {file}"))
    }
}
