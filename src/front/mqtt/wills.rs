//! A will: the message in a client's CONNECT that is published when the connection is lost (MQTT 5
//! section 3.1.2.5). It goes through intake like any other message, under the key that the client
//! connected with. If that key is dead by then, the will is refused.
//!
//! A copy of it is in the session store for as long as the client is connected, or the will waits: if the gateway is
//! killed, its next run publishes it, or in a cluster another gateway.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::client_identity::ClientIdentity;
use super::codec::connect;
use super::codec::properties::WILL_DELAY;
use super::forwarded::{ForwardedProperties, mount_of};
use super::sessions::random_number;
use crate::auth::usage::KeyClient;
use crate::auth::{Grant, GrantDenial};
use crate::consume::subscriber::sessions::{SessionStore, SessionStoreChange, StoredWill};
use crate::intake::{Draft, IncomingMessage, Intake, Refusal};
use crate::limits::REFUSED_WILL_BYTES_PER_TENANT_MAX;
use crate::memory::MemoryCharge;
use crate::message::{DatasourceId, RecordFlags, TimeMicros, Transport};
use crate::shares::{ShareCharge, ShareCount, ShareExceeded, TenantShares};

/// What a will takes beside its texts.
const WILL_BYTES: usize = 256;
/// The pause before a will that was refused is published again, which doubles each time.
const WILL_RETRY_PAUSE_MIN: Duration = Duration::from_secs(1);
const WILL_RETRY_PAUSE_MAX: Duration = Duration::from_secs(60);

/// A will that has passed intake's checks.
pub(super) struct MqttWill {
    grant: Grant,
    who: Arc<ClientIdentity>,
    content: Arc<StoredWill>,
    /// What it takes in memory, for as long as the connection or the will waits.
    _memory: MemoryCharge,
    /// The delay between the loss of the connection and the publication, in seconds.
    pub(super) delay_s: u32,
    /// Its copy in this gateway's store.
    copy: Option<WillCopy>,
    /// There is or was a copy, here or in another gateway's store: it is kept in the log once.
    has_copies: bool,
    /// How often it was refused, for causes that pass.
    refused: u32,
    /// What it takes of its tenant's share since then.
    refused_charge: Option<ShareCharge>,
}

/// The copy of a will in the store. It goes with the will, however that ends; a gateway that is killed leaves it.
struct WillCopy {
    store: SessionStore,
    id: Option<u64>,
}

impl Drop for WillCopy {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            drop(self.store.write(vec![SessionStoreChange::RemoveWill(id)]));
        }
    }
}

impl MqttWill {
    /// Makes a will from a CONNECT, and checks it. `scope` is that of the key.
    ///
    /// # Errors
    /// The refusal with which intake would answer the will.
    pub(super) fn new(
        will: &connect::ConnectWill<'_>,
        (grant, scope): (&Grant, &DatasourceId),
        who: &Arc<ClientIdentity>,
        publisher: u64,
        intake: &Intake,
    ) -> Result<Self, Refusal> {
        let mut flags = RecordFlags::WILL;
        if will.retain {
            flags = flags.with(RecordFlags::RETAIN);
        }
        flags = flags.with(RecordFlags::of_mqtt_qos(will.qos));
        let bytes = will.topic.len() + will.payload.len() + will.properties.wire_bytes() + WILL_BYTES;
        let memory = intake.memory_account(grant).charge(bytes)?;
        let mount = mount_of(grant, will.topic);
        let ForwardedProperties { content_type, wire: properties } =
            ForwardedProperties::of(&will.properties, mount, intake.metrics());
        let delay_s = will.properties.u32(WILL_DELAY).unwrap_or(0);
        let content = StoredWill {
            id: random_number(),
            scope: scope.clone(),
            target: target_of(grant, will.topic, intake).map(|target| target.as_str().to_owned()),
            key_id: grant.key_id().0,
            client_id: who.client.as_ref().to_owned(),
            address: who.address,
            session: None,
            topic: will.topic.to_owned(),
            payload: will.payload.to_owned(),
            content_type: content_type.to_owned(),
            properties,
            flags: flags.0,
            publisher,
            delay_s,
            lost_at: None,
        };
        let will = Self {
            _memory: memory,
            grant: grant.clone(),
            who: who.clone(),
            content: Arc::new(content),
            delay_s,
            copy: None,
            has_copies: false,
            refused: 0,
            refused_charge: None,
        };
        will.draft(intake, true)?;
        Ok(will)
    }

    /// Takes up a will that an earlier run of this gateway has left in `store`, or that another gateway has left.
    ///
    /// # Errors
    /// Its key is dead.
    pub(super) fn from_stored(
        content: Arc<StoredWill>,
        store: Option<&SessionStore>,
        intake: &Intake,
    ) -> Result<Self, GrantDenial> {
        let copy = store.map(|store| WillCopy { store: store.clone(), id: Some(content.id) });
        let authorizer = intake.authorizer();
        let grant = authorizer.grant_of_key(&content.datasource(), content.key_id())?;
        // A key id is part of a digest: another incarnation has other keys.
        if authorizer.registry().scope_of(grant.key()).as_ref() != Some(&content.scope) {
            return Err(GrantDenial::Revoked);
        }
        let user = KeyClient::new(Transport::Mqtt, Some(content.address), Some(&content.client_id));
        let (client, user) = (content.client_id.as_str().into(), Arc::new(user));
        let who = Arc::new(ClientIdentity { address: content.address, client, user, is_bridge: false });
        let bytes = content.topic.len() + content.payload.len() + content.properties.len() + WILL_BYTES;
        let memory = intake.memory_account(&grant).charge_held(bytes);
        Ok(Self {
            grant,
            who,
            delay_s: content.delay_s,
            content,
            _memory: memory,
            copy,
            has_copies: true,
            refused: 0,
            refused_charge: None,
        })
    }

    /// About how many bytes its copy in the store takes.
    pub(super) fn stored_bytes(&self) -> usize {
        let StoredWill { topic, payload, properties, .. } = &*self.content;
        topic.len() + payload.len() + properties.len() + WILL_BYTES
    }

    /// Keeps a copy in the store for as long as there is the will, for a client whose session has this number if it
    /// outlives the connection. Nothing is written before the future is polled, which resolves when the copy is on the disk,
    /// or cannot be written now.
    pub(super) fn keep(
        &mut self,
        store: &SessionStore,
        session: Option<u64>,
    ) -> impl Future<Output = ()> + Send + 'static + use<> {
        Arc::make_mut(&mut self.content).session = session;
        self.has_copies = true;
        self.copy = Some(WillCopy { store: store.clone(), id: Some(self.content.id) });
        let (store, content) = (store.clone(), self.content.clone());
        async move {
            let written = store.write(vec![SessionStoreChange::PutWill(content)]);
            // The store reports it. The will is published all the same, unless the gateway is killed.
            let _ = written.await;
        }
    }

    /// Notes when the connection was lost: from then on the will waits.
    pub(super) fn note_loss(&mut self, lost_at: TimeMicros) {
        let Some(copy) = &self.copy else { return };
        Arc::make_mut(&mut self.content).lost_at = Some(lost_at);
        drop(copy.store.write(vec![SessionStoreChange::PutWill(self.content.clone())]));
    }

    /// Whether the store has a copy of it.
    pub(super) fn has_copy(&self) -> bool {
        self.copy.is_some()
    }

    /// Leaves the will to whoever finds its copy.
    pub(super) fn leave_copy(mut self) {
        if let Some(copy) = &mut self.copy {
            copy.id = None;
        }
    }

    /// How long it still waits, if its session stays for `expiry_s` seconds.
    pub(super) fn wait_left(&self, expiry_s: u32, now: TimeMicros) -> Duration {
        let left = self.content.due_at(expiry_s, now).saturating_sub(now);
        Duration::from_micros(u64::try_from(left).unwrap_or(0))
    }

    /// The number of the session that it waits with.
    pub(super) fn session(&self) -> Option<u64> {
        self.content.session
    }

    /// Drops the will. Resolves when its copy is gone.
    pub(super) async fn discard(mut self) {
        if let Some(mut copy) = self.copy.take()
            && let Some(id) = copy.id.take()
        {
            let _ = copy.store.write(vec![SessionStoreChange::RemoveWill(id)]).await;
        }
    }

    /// The datasource of the client's key, or `*`.
    pub(super) fn datasource(&self) -> &DatasourceId {
        self.grant.datasource()
    }

    /// Counts it among the refused wills of its tenant.
    ///
    /// # Errors
    /// [`ShareExceeded`], if too many of them wait.
    pub(super) fn charge_refused(&mut self, shares: &TenantShares) -> Result<(), ShareExceeded> {
        if self.refused_charge.is_none() {
            let mut charge = shares.share(self.datasource()).charge();
            let bytes = self.stored_bytes() as u64;
            charge.try_add(ShareCount::RefusedWillBytes, bytes, REFUSED_WILL_BYTES_PER_TENANT_MAX)?;
            self.refused_charge = Some(charge);
        }
        Ok(())
    }

    /// Notes in its copy that it is due: it waits for no session any more, whether its client is back or not.
    pub(super) fn note_due(&mut self) {
        let Some(copy) = self.copy.as_ref().filter(|_| self.delay_s > 0 && self.content.session.is_some())
        else {
            return;
        };
        Arc::make_mut(&mut self.content).session = None;
        drop(copy.store.write(vec![SessionStoreChange::PutWill(self.content.clone())]));
    }

    /// How long to wait before it is published again.
    pub(super) fn retry_pause(&self) -> Duration {
        let doublings = self.refused.saturating_sub(1).min(16);
        (WILL_RETRY_PAUSE_MIN * (1 << doublings)).min(WILL_RETRY_PAUSE_MAX)
    }

    /// Publishes the will. Returns when it is durable or refused: the will, with its copy, if what refuses it may pass.
    #[must_use]
    pub(super) async fn publish(mut self: Box<Self>, intake: &Intake) -> Option<Box<Self>> {
        let Err(refusal) = self.submit(intake).await else { return None };
        let may_pass = refusal.is_transient();
        // What this node tries again and again is told once.
        if !may_pass || self.refused == 0 {
            intake.refusals().note(self.who.note(&self.grant, refusal.note(Transport::Mqtt)));
            info!(
                key_id = %self.grant.key_id(), cause = refusal.cause().name(), %refusal, may_pass,
                "a will was refused"
            );
        }
        self.refused = self.refused.saturating_add(1);
        may_pass.then_some(self)
    }

    async fn submit(&self, intake: &Intake) -> Result<(), Refusal> {
        let target = target_of(&self.grant, &self.content.topic, intake);
        if target.as_ref().map(DatasourceId::as_str) != self.content.target.as_deref() {
            // The datasource was deleted. One that was made again under its name is another one.
            let named = self.content.topic.split('/').next().unwrap_or_default();
            return Err(Refusal::NoDatasource(named.chars().take(64).collect()));
        }
        let mut paid = false;
        let draft = loop {
            match self.draft(intake, paid) {
                Err(Refusal::Limited(limited)) if limited.is_held_back() => {
                    paid = intake.wait_turn(*limited).await?;
                }
                drafted => break drafted?,
            }
        };
        intake.submit(draft).await.map(drop)
    }

    /// With `paid`, the will is not counted against a rate.
    fn draft(&self, intake: &Intake, paid: bool) -> Result<Draft, Refusal> {
        let content = &*self.content;
        let mut draft = intake.draft(Transport::Mqtt, content.publisher);
        draft.set_client(&self.who.user);
        if paid {
            draft.mark_paid();
        }
        // A gateway that was killed when it had just published it leaves a copy: it is kept once.
        let message_id = self.has_copies.then(|| content.message_id());
        let message = IncomingMessage {
            topic: &content.topic,
            payload: &content.payload,
            content_type: &content.content_type,
            properties: &content.properties,
            flags: content.record_flags(),
            message_id: message_id.as_deref(),
            exchange: None,
        };
        match draft.push(&self.grant, None, message).map_err(|refusal| *refusal) {
            // A quarantined will is in the draft too, and is kept in quarantine.
            Ok(_) | Err(Refusal::Quarantined(_)) => Ok(draft),
            Err(refusal) => Err(refusal),
        }
    }
}

/// With a key for all, the datasource that a topic names, in its present incarnation.
fn target_of(grant: &Grant, topic: &str, intake: &Intake) -> Option<DatasourceId> {
    let (id, _) = topic.split_once('/').filter(|_| grant.datasource().is_all())?;
    let registry = intake.authorizer().registry();
    registry.with_datasource(id, |datasource| datasource.id.scope(datasource.incarnation))
}
