//! Who is connected: one connection per client identifier within a datasource. A client that
//! connects again takes over from its earlier connection; another datasource's client of the same
//! name is another client.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::auth::connections::{Close, Control};
use crate::message::DatasourceId;

type ClientKey = (DatasourceId, Arc<str>);

/// The connected clients.
#[derive(Default)]
pub(super) struct Sessions {
    clients: Mutex<Clients>,
}

#[derive(Default)]
struct Clients {
    connected: HashMap<ClientKey, Arc<Control>>,
    /// No more are taken in.
    draining: bool,
}

impl Sessions {
    /// Enters a client; an earlier connection of it is told to close. It leaves when the returned
    /// guard is dropped.
    pub(super) fn enter(
        self: &Arc<Self>,
        datasource: DatasourceId,
        client_id: Arc<str>,
        control: Arc<Control>,
    ) -> Present {
        let key = (datasource, client_id);
        let mut clients = self.locked();
        if clients.draining {
            control.close(Close::Drain);
        }
        let earlier = clients.connected.insert(key.clone(), control.clone());
        drop(clients);
        if let Some(earlier) = earlier {
            earlier.close(Close::TakenOver);
        }
        Present { sessions: self.clone(), key, control }
    }

    /// Tells every client, and every one that comes after, to close.
    pub(super) fn drain(&self) {
        let mut clients = self.locked();
        clients.draining = true;
        clients.connected.values().for_each(|control| control.close(Close::Drain));
    }

    fn locked(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's place among the [`Sessions`].
pub(super) struct Present {
    sessions: Arc<Sessions>,
    key: ClientKey,
    control: Arc<Control>,
}

impl Present {
    /// The client identifier.
    pub(super) fn client_id(&self) -> &str {
        &self.key.1
    }

    /// What the connection is told.
    pub(super) fn control(&self) -> &Control {
        &self.control
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        let mut clients = self.sessions.locked();
        // A later connection of the same client may have taken the place.
        if clients.connected.get(&self.key).is_some_and(|present| Arc::ptr_eq(present, &self.control)) {
            clients.connected.remove(&self.key);
        }
    }
}
